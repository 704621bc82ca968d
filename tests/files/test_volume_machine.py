"""Every file operation against a plain model, over commits and crashes."""

import pytest

from tests.model.files_machine import FilesMachine
from tests.model.profiles import MACHINE_SECONDS_MAX, machine_settings

TestVolumeMachine = FilesMachine.TestCase
TestVolumeMachine.settings = machine_settings(examples=140, steps=50)
TestVolumeMachine.__doc__ = (
    "Promise: files are what was done to them, whatever is committed or lost."
)
TestVolumeMachine.pytestmark = [pytest.mark.timeout(MACHINE_SECONDS_MAX)]
