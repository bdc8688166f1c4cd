"""What a node has, asked by tasks there. Imported in engines' environments, too: nothing here needs more than Ray."""

import ray

from serve.artifacts.node_facts import NodeFacts
from serve.artifacts.node_probe import installed_libraries, probe_node


@ray.remote(num_cpus=0, max_retries=1)  # type: ignore[untyped-decorator]
def node_facts() -> NodeFacts:
    """Return the facts of the task's node, with the GPUs that it was given."""
    return probe_node()


@ray.remote(num_cpus=0, max_retries=1)  # type: ignore[untyped-decorator]
def library_versions() -> dict[str, str]:
    """Return the versions of what is installed in the task's environment."""
    return installed_libraries()
