"""One look for every progress bar: on standard error if that is a terminal, gone where the user asks for quiet."""

from __future__ import annotations

from typing import NoReturn

from tqdm import tqdm


def bar(*, total: int, label: str, unit: str, show: bool, done: int = 0) -> tqdm[NoReturn]:
    return tqdm(
        total=total, initial=done, desc=label, unit=f" {unit}", disable=None if show else True, dynamic_ncols=True, leave=False
    )
