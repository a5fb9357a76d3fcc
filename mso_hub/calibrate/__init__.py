"""Source + text -> what activations are like: statistics, Hessians, likelihoods; one decoder layer in memory."""
