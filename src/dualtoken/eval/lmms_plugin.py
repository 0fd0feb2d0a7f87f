"""`Answers` as a model class of lmms-eval. Imported by lmms-eval alone, through `dualtoken.eval.lmms:manifest`."""

from lmms_eval.api.model import lmms

from dualtoken.eval.lmms import Answers


class DualToken(Answers, lmms):
    """`lmms_eval --model dualtoken`: under accelerate launch each process answers its share of the documents."""

    is_simple = True
