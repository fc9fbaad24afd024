"""python tools/bench NAME: the same as python tools/bench/bench.py NAME."""

from bench import main

from asda.errors import exit_with_sentence

if __name__ == "__main__":
    exit_with_sentence(main)
