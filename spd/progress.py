"""One look for every progress bar: on standard error if that is a terminal, gone where the user asks for quiet.

Of several processes on one job only the main one shows it.
"""

from __future__ import annotations

from typing import NoReturn

from tqdm import tqdm

from spd.distributed import is_main


def bar(*, total: int, label: str, unit: str, show: bool, done: int = 0) -> tqdm[NoReturn]:
    unit = f" {unit}"
    hidden = None if show and is_main() else True  # None: hidden where there is no terminal
    return tqdm(total=total, initial=done, desc=label, unit=unit, disable=hidden, dynamic_ncols=True, leave=False)
