"""`report_to: aim`: the paper's runs were tracked with Aim, which transformers does not know by name."""

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK


class Aim:
    """
    Aim's own callback, imported when a run asks for it.

    It writes to the repository `.aim` of the working directory, or of the nearest folder above that has one; `aim up`
    shows it. A resumed run is another run there.

    Raises:
        ImportError: if Aim is not installed.
    """

    def __new__(cls):
        try:
            from aim.hugging_face import AimCallback
        except ImportError as error:
            raise ImportError(
                "expected Aim for report_to: aim, found none; install it with pip install 'cm3leon_hf[aim]'"
            ) from error
        return AimCallback()


INTEGRATION_TO_CALLBACK["aim"] = Aim
