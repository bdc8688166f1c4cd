"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# Examples are judged by what they do, not by how long a busy machine takes for one.
settings.register_profile("raytrt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raytrt")
