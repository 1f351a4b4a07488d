"""What a run will need, before a GPU is booked: a dry run of any rank of a plan at its true size."""
