"""`python -m rfield` is the command `rfield`."""

from rfield.segmentation.cli import main

if __name__ == "__main__":
    main()
