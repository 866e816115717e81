"""What the tests of finetuning share."""

from __future__ import annotations

import pytest

from demerge.data import ImageData, load_images


@pytest.fixture(scope="session")
def data() -> ImageData:
    """32 digits."""
    return load_images("digits", split="train", limit=32)
