"""Names that the decorator, the settings, the events and the format share. Imports nothing."""

VERSION = "0.1.0"

PHASES = ("weight_load", "pool_alloc", "kernel_compile", "custom_init", "warmup_inference")
"""The phases of a start, in their order."""

MASK = "****"
"""What stands where a secret was."""

BUFFER_KINDS = ("weights", "kv_cache", "activations", "gradients", "optimizer_state", "other")
"""What a buffer of a state is for."""

MODAL_SNAPSHOTS = ("off", "cpu", "gpu")
"""What of a start lies before Modal's own snapshot of the process."""

SKIPPABLE_PHASES = PHASES[1:]
"""Without weight_load there is no state to go on with."""
