"""`python -m distill_ray`: the same as the command `distill-ray`."""

import sys

from distill_ray.cli import main

sys.exit(main())
