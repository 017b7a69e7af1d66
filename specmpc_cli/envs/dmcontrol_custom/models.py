"""Editing a stock MuJoCo model before it is compiled."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any


def edited(model_and_assets: tuple[Any, dict[str, Any]], edit: Callable[[ET.Element], None]) -> tuple[str, dict[str, Any]]:
    """A domain's (XML, assets) after `edit` changed the XML's root element."""
    model, assets = model_and_assets
    root = ET.fromstring(model)
    edit(root)
    return ET.tostring(root, encoding="unicode"), assets
