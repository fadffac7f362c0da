"""`python -m ipvg_ray` is `ipvg-ray`."""

import sys

from ipvg_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
