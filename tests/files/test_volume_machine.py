"""Promise: every file operation agrees with a plain model, over commits and crashes."""

from tests.model.files_machine import FilesMachine
from tests.sizes import machine_settings

TestVolumeMachine = FilesMachine.TestCase
TestVolumeMachine.settings = machine_settings(short=40, long=140, steps=50)
TestVolumeMachine.__doc__ = (
    "Promise: files are what was done to them, whatever is committed or lost."
)
