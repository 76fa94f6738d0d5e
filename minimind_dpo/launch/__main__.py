"""`python -m minimind_dpo.launch ARGS`, with the arguments of `accelerate launch`."""

import sys

from minimind_dpo.ending import Ending
from minimind_dpo.launch import main

if __name__ == "__main__":
    with Ending() as ending:
        ending.code = main(sys.argv[1:])
    sys.exit(ending.code)
