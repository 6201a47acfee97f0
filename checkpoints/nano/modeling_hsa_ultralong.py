try:
    from hsa_ultralong import HSAConfig, HSAForCausalLM, HSAModel  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "hsa_ultralong":
        raise
    raise ImportError("this model needs the library hsa_ultralong: pip install hsa-ultralong") from None
