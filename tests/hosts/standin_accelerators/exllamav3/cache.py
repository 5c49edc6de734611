class CacheLayer_fp16:
    pass


class CacheLayer_quant:
    pass
