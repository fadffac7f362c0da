"""Entry point of the whole pipeline for `ray job submit`; takes the options of `ipvg-ray run`.

`ipvg-ray submit` does this and follows the job; docs/clusters.md says more.

ray job submit --working-dir . -- python jobs/run_pipeline.py s3://bucket/identities --out /shared/run --profile gpu
"""

import sys

from ipvg_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
