"""The gateway, the replicas behind it and their deployment."""
