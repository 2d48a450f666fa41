"""Train a model of the zoo.

python train.py                                        the default experiment: UniRepLKNet on MNIST digits
python train.py experiment=digits trainer.max_epochs=5
python train.py --help                                 every group, choice and experiment
"""

from zoo.training.launch import main

if __name__ == "__main__":
    main()
