"""`python -m gi_segmentation.kaggle_package`: prepare a training or a submission in Kaggle's notebooks."""

import argparse
from pathlib import Path

from gi_segmentation.errors import InputError, exit_on_input_error
from gi_segmentation.processes import leaving_no_process_behind

# Under this folder of a clone are the files that a package is made of.
ROOT = Path(__file__).resolve().parents[1]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        InputError: If flags contradict each other.
    """
    parser = argparse.ArgumentParser(
        "python -m gi_segmentation.kaggle_package",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--user", required=True, help="your name on Kaggle, as in kaggle.com/NAME")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for the package")
    parser.add_argument(
        "--model",
        nargs="+",
        default=[],
        help="folders or Hub ids of checkpoints; the submission averages them. Without any, the package has a "
        "training notebook too, and the submission takes what it has trained",
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        help="recipe of the training notebook; its pre-trained checkpoint is packed too; None: segformer-b4",
    )
    parser.add_argument("--title", default="GI tract segmentation", help="the beginning of all titles on Kaggle")
    parser.add_argument(
        "--image_packages",
        type=Path,
        default=ROOT / "notebooks" / "kaggle" / "image_packages.txt",
        help="output of `pip freeze` in a notebook of Kaggle with a GPU; only what it lacks is packed",
    )
    parser.add_argument("--python_version", default="3.12", help="the Python there")
    arguments = parser.parse_args(argv)
    if arguments.model and arguments.recipe:
        raise InputError("--recipe is for a package that trains; leave it out, or --model")
    arguments.recipe = arguments.recipe or ROOT / "recipes" / "segformer-b4.yaml"
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Write the package, and print what to do next.

    Raises:
        InputError: If a checkpoint, the recipe or the name cannot be used, if the folder has files already, or if a
            download fails. Then nothing is written.
    """
    arguments = parse_arguments(argv)
    # This import stands here because PyTorch takes seconds to load. `--help` or a mistake in a flag does not need it.
    from gi_segmentation.publishing.kaggle import PackagePlan, write_package

    plan = PackagePlan(
        user=arguments.user,
        title=arguments.title,
        models=arguments.model,
        recipe=arguments.recipe,
        image_packages=arguments.image_packages,
        python_version=arguments.python_version,
    )
    print(write_package(plan, arguments.output_dir))


if __name__ == "__main__":
    with leaving_no_process_behind(), exit_on_input_error():
        main()
