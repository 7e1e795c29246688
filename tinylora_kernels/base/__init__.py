"""The frozen model: what an adapter can sit on, and its weight as a matrix [out, in], however it is kept."""
