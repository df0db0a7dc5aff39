"""``python -m kvbench.caching.proxy``: run the caching proxy."""

from kvbench.caching.proxy.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
