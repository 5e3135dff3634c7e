"""Switches off the usage reports that vLLM, Ray and the packages of Hugging Face send by default.

Done where this package is imported, because some of them read these variables once, when they are imported themselves. Processes
that are started from here inherit the variables.
"""

from __future__ import annotations

import os

USAGE_REPORTS_OFF = {
    "DO_NOT_TRACK": "1",  # many packages; vLLM among them
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",  # transformers, datasets and TRL's trainers as well
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def switch_off_usage_reports() -> None:
    """Sets the variables, except those that you have set yourself."""
    for name, value in USAGE_REPORTS_OFF.items():
        os.environ.setdefault(name, value)
