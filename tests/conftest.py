"""Settings of all tests."""

import os

from hypothesis import HealthCheck, settings

# Examples are judged by what they do, not by how long a busy machine takes for one.
settings.register_profile("raytrt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raytrt")

# Threads of PyTorch that spin while they wait starve each other on a machine with few cores; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
