"""For `ray job submit`: run the pipeline as far as stage text_states, from what its run directory already holds."""

import sys

from ipvg_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:], "--until", "text_states"]))
