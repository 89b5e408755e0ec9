from . import tracking as tracking  # makes transformers know Aim
