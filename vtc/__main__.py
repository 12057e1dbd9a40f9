"""`python -m vtc`, and `accelerate launch -m vtc eval scenes ...` on several processes: the command `vtc`."""

import sys

from vtc.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
