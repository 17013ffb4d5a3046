"""Fill the card templates of `model_cards/`."""

from importlib.resources import files
from typing import Any

import jinja2


def render_card(template_name: str, **facts: Any) -> str:
    """Fill a card template.

    Args:
        template_name: Name of a file in `model_cards/`.
        **facts: A value for each variable of the template.

    Returns:
        The card: Markdown with YAML front matter.

    Raises:
        jinja2.UndefinedError: If the template has a variable without a value.
    """
    # `model_cards` is a package, so the templates are also found in an installed copy of this project.
    template = files("model_cards").joinpath(template_name).read_text(encoding="utf-8")
    # `StrictUndefined` makes a missing fact an error. `ModelCard.from_template` of huggingface_hub leaves a blank.
    # `trim_blocks` and `lstrip_blocks` remove the lines of `{% if %}` and `{% for %}`, which would cut a table in two.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(template).render(facts)
