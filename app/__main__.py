"""`python -m app`: start the web page."""

from app.app import main
from gi_segmentation.errors import exit_on_input_error

if __name__ == "__main__":
    with exit_on_input_error():
        main()
