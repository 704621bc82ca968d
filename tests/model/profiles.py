"""How long the state machines run: `pytest --hypothesis-profile=long`, or `quick`.

The number of examples scales with the profile; a failure prints the blob that repeats it.
"""

from hypothesis import HealthCheck, settings

MACHINE_SECONDS_MAX = 6 * 3600  # shrinking a failure takes long, and so does the long profile

_CHECKS_OFF = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

for _name, _factor in (("quick", 0.2), ("long", 40.0)):
    settings.register_profile(
        _name,
        deadline=None,
        max_examples=max(1, int(100 * _factor)),
        suppress_health_check=_CHECKS_OFF,
        print_blob=True,
    )


def machine_settings(examples: int, steps: int) -> settings:
    """Settings of one machine: `examples` at the default length, scaled by the profile in use."""
    factor = settings().max_examples / 100
    return settings(
        max_examples=max(1, round(examples * factor)),
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=_CHECKS_OFF,
        print_blob=True,
    )
