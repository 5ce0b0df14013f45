//! What a VM may not reach, as its users hear of it.

use std::sync::Arc;

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::emission::{Emission, Notice};
use crate::net::Denial;

/// Tells listeners of what is sent, until the VM has ended. What is sent is bounded in time, and what
/// waits for a slow listener in number.
pub(super) fn tell(emission: Arc<Emission>) -> UnboundedSender<Denial> {
    let (sender, mut denials) = unbounded_channel();
    tokio::spawn(async move {
        while let Some(denial) = denials.recv().await {
            emission.notify(&Notice::NetworkDenied(denial));
        }
    });
    sender
}
