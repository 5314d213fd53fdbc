"""An engine's configuration, as far as the plug-in's processors look at one."""

from types import SimpleNamespace


def config(**fields):
    """Of four slots, without speculative decoding; `fields` beside them."""
    scheduler = SimpleNamespace(max_num_seqs=4)
    return SimpleNamespace(scheduler_config=scheduler, speculative_config=None, **fields)
