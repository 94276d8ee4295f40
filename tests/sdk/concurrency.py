"""Many streams at once, the same way in both SDKs."""

import asyncio

from sdks import Sdk
from stack import PATIENCE_S


async def all_at_once(sdk: Sdk, model: str, count: int) -> None:
    """`count` streams, none of which is read beyond its first word before all have one. Each must be complete, and the
    answer to its own question."""
    begun = 0
    all_have_begun = asyncio.Event()

    async def one(client, number: int) -> None:
        nonlocal begun
        words = []
        is_complete = False
        async with await sdk.async_stream(client, model, f"this is caller {number} speaking") as stream:
            async for event in stream:
                if (word := sdk.piece(event)) and not words:
                    begun += 1
                    if begun == count:
                        all_have_begun.set()
                    await all_have_begun.wait()
                words.append(word)
                is_complete |= sdk.is_last(event)
        assert f'you said "this is caller {number} speaking"' in "".join(words)
        assert is_complete, words

    async with sdk.async_client() as client:
        await asyncio.wait_for(asyncio.gather(*(one(client, number) for number in range(count))), PATIENCE_S)
