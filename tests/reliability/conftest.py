"""The full set of kills runs only when asked for by name: ``pytest -m reliability_full``."""


def pytest_collection_modifyitems(config, items):
    if "reliability_full" in (config.option.markexpr or ""):
        return
    left_out = [item for item in items if "reliability_full" in item.keywords]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if "reliability_full" not in item.keywords]
