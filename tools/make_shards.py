"""`asda shards` by its path in a checkout: python tools/make_shards.py --help"""

import os
import sys

# Python has put tools/ first. Put the checkout there: its code is what runs, and no file of tools/ hides a package.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

from asda.__main__ import main

if __name__ == "__main__":
    main(["shards", *sys.argv[1:]])
