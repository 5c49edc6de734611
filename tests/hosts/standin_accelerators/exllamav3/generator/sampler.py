class Sampler:
    def __init__(self, *settings):
        pass


CustomSampler = SS_AdaptiveP = SS_Argmax = SS_MinP = SS_PresFreqP = SS_RepP = SS_Sample = SS_Temperature = Sampler
SS_TopK = SS_TopP = Sampler
