"""`python -m memory_worker [serve|migrate|check-config]`."""

from memory_worker.cli import main

if __name__ == "__main__":
    main()
