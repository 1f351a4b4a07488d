"""One update after another: step, loss, optimizer, schedule, evaluation, checkpoints, metrics."""
