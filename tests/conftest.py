"""One thread: the models of the tests are tiny, and threads that wait for work cost more."""

import torch

torch.set_num_threads(1)
