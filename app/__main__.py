"""`python -m app`: start the web page."""

from app.app import main
from gi_segmentation.errors import exit_on_input_error
from gi_segmentation.processes import leaving_no_process_behind

if __name__ == "__main__":
    with leaving_no_process_behind(), exit_on_input_error():
        main()
