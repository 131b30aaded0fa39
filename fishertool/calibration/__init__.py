"""Data files and Hub datasets -> the examples of a task as token ids, and a fingerprint of them."""

from fishertool.calibration.data import UNSCORED, CalibrationData, DataOptions, Example
from fishertool.calibration.forms import Form, load
from fishertool.calibration.rows import check_data_source

__all__ = [
    "UNSCORED",
    "CalibrationData",
    "DataOptions",
    "Example",
    "Form",
    "check_data_source",
    "load",
]
