"""Application-level caches: small, typed parts that a service could take over."""
