//! What a VM can reach: policy, DNS, and the redirect proxy.
