"""Render the cards of `model_cards/`: every fact a template names must be there."""

from importlib.resources import files
from typing import Any

import jinja2


def render_card(template_name: str, **facts: Any) -> str:
    """Fill a card template.

    Args:
        template_name: File name in `model_cards/`.
        **facts: What the template asks for.

    Returns:
        The card, Markdown with YAML front matter.

    Raises:
        jinja2.UndefinedError: If the template names a fact that is missing. (`ModelCard.from_template` would leave
            a blank instead.)
    """
    template = files("model_cards").joinpath(template_name).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(template).render(facts)
