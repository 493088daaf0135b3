"""`python -m hydradeploy`."""

from hydradeploy.cli import main

if __name__ == "__main__":
    main()
