"""`accelerate launch -m vtc.eval scenes ...`: as `vtc eval`, on several processes."""

import sys

from vtc.cli.command import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
