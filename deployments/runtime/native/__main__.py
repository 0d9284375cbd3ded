"""``python -m deployments.runtime.native``: compile the kernels ahead of the first stage that needs them.

Prints where the library is; exit status 1 with the reason on standard error where this machine cannot use them.
"""

import sys
from pathlib import Path

from deployments.runtime.native.architecture import NotNativeError
from deployments.runtime.native.build import CACHE, build, check_processor, processor_flags


def main() -> int:
    """Build; returns the exit status."""
    try:
        check_processor(processor_flags())
        library = build(Path.home() / CACHE)
    except NotNativeError as error:
        sys.stderr.write(f"native kernels cannot be used: {error}\n")
        return 1
    sys.stdout.write(f"{library}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
