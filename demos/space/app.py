"""The demo as a Hugging Face Space: on a GPU where ZeroGPU lends one, else on the CPU. Runs anywhere: python app.py"""

try:
    import spaces  # before torch, so that it can lend the GPU

    GPU = spaces.GPU
except ImportError:

    def GPU(run):
        return run


from vtc.demo import LAUNCH, create_demo

demo = create_demo(GPU)

if __name__ == "__main__":
    demo.launch(**LAUNCH)
