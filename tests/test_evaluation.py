"""The figures of an evaluation do not depend on the linear algebra kernel a machine or an environment selects."""
import os
import subprocess
import sys

import pytest

SCRIPT = """
import hashlib
import numpy as np
from ml_ensemble.evaluation import _bootstrap_means
columns = np.random.default_rng(3).random((5459, 12))
print(hashlib.sha256(_bootstrap_means(columns, 9, 300, seed=1).tobytes()).hexdigest())
"""


@pytest.mark.untraced
@pytest.mark.slow
def test_the_bootstrap_gives_the_same_bits_under_every_kernel():
    """A matrix product sums in another order under each kernel of OpenBLAS, and the last digit of an interval moves."""
    answers = set()
    for kernel in ("Haswell", "Nehalem", "Prescott"):
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
                              env={**os.environ, "OPENBLAS_CORETYPE": kernel})
        answers.add(done.stdout)
    assert len(answers) == 1
