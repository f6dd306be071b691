"""English prose that every Python carries: the language reference of `pydoc_data.topics` (0.46 MB, about 110k tokens)."""

from __future__ import annotations

import pydoc_data.topics

from qcore import CalibrationDataset, CalibrationRequest, hookimpl


class Topics(CalibrationDataset):
    """Needs no network; the text differs a little between Python versions."""

    name = "topics"
    description = "Python's language reference (pydoc topics): English prose, always there"

    def load(self, request: CalibrationRequest) -> list[str]:
        """Return all topics as one document, in sorted order."""
        topics: dict[str, str] = pydoc_data.topics.topics
        return ["\n\n".join(topics[name] for name in sorted(topics))]


@hookimpl
def qcore_calibration_datasets() -> list[CalibrationDataset]:
    return [Topics()]
