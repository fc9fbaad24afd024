"""`asda shards` by its path in a checkout: python tools/make_shards.py --help"""

import os
import sys

# Python has put tools/ first. Put the checkout there: its code is what runs, and no file of tools/ hides a package.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

from asda.commands.shards import main
from asda.errors import exit_with_sentence

if __name__ == "__main__":
    exit_with_sentence(main)
